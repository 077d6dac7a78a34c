"""Raw hospital layouts to studies."""
