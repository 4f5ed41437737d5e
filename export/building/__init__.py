"""The mechanics of a build: the jobs, the processes that do them, and the parts that an earlier build left."""
