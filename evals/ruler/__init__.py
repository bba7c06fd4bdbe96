"""RULER: its samples, tasks, texts and files."""
