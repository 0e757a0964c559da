"""Frameworks: each module imports one, and only a program that uses it imports the module."""
