"""Files: written whole or not at all, read with distrust, and one store to resume from."""
