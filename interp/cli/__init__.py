"""The command line.

`main` has the app, `options` what the commands share; each other module has one family of commands.
"""
