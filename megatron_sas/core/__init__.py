"""What every part shares: command lines, files that are whole or absent, devices, processes and ranks."""
