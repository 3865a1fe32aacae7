"""A family per file: presets, and (with its reader) the translation of a published config and its name table."""
