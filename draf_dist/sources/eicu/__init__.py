"""The eICU Collaborative Research Database (and its public demo) as studies: docs/data.md."""
