"""The command line: `main` has the app, `options` what the commands share, one module a family of commands."""
