"""What model and training stand on: attention, checkpoint, parallel, schedule, memory."""
