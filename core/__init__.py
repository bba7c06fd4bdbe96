"""What model and training stand on: attention, checkpoints, ranks that share weights and tokens, schedules,
memory."""
