"""What the computer gives: devices, processes, whole files, locks of folders, and bars of progress."""
