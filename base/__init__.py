"""What any program needs: flags and one-line errors, files that no crash can tear, ranks, figures. Imports
nothing of ours."""
