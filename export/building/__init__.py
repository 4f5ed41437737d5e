"""The mechanics of a build: what must be made, by which process, and what stands from an earlier one."""
