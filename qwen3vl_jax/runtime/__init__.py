"""Processes of a pod and the console."""
