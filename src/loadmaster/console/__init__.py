"""What the commands are made of: what a person sees, the orders a process is given, and the work of `node` and `stage`."""
