"""Where parts are computed: in this process, in local processes, or by Ray."""
