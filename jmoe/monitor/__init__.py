"""What people see of a run: console, logs, the files they go to, and a report."""
