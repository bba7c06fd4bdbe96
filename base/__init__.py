"""What any program needs: flags, one-line errors, files that no crash can tear, ranks, figures.

base/ imports nothing of ours."""
