"""Typed settings: every default with its unit and its reason.

Lives here: what can be set, and how the environment and flags override the defaults.
Does not live here: what a setting does; each part is handed the values it needs.
"""
