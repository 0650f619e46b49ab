"""Starting the mains on many devices, many hosts, and many settings."""
