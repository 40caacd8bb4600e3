"""The machine: devices, processes, files written whole, locks of folders, progress bars, and the user's own code."""
