"""What a command does: train, sample, evaluate, restore, and what their files hold."""
