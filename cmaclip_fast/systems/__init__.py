"""The systems that can be chosen, one file each; see docs/systems.md for how to add one."""
