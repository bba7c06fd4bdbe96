"""Rows in: files and tasks, the chat format, rewards and what calls them."""
