"""Where parts are computed: in this process, in local processes, by Ray."""
