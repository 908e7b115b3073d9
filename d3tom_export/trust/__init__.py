"""What strangers wrote, read with care: names are data, only regular files are opened, limits come before work.

Everything that comes from a checkpoint, a bundle or a sample set goes through here. Imports no framework.
"""
