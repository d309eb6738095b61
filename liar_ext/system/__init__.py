"""What the machine gives: files, memory, a terminal, other processes of the same job."""
