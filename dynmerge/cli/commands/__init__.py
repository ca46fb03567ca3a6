"""Commands: the words and options of `dynmerge`, and what they run.

What a command does is in a module of its own beside this folder, imported when it runs, because
torch and the server take seconds to load.
"""
