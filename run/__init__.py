"""What belongs to one training run: settings, metrics, resuming, the plan before it, the dry run."""
