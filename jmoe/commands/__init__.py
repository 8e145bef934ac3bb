"""Programs: what a command line asks for, and how it is answered in the terminal."""
