"""Folders and files, whole or not at all; what else of the house reads and writes goes through here."""
