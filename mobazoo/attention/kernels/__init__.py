"""Schedules and kernel providers behind the ``flash`` backend."""
