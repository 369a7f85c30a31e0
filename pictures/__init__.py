"""Where pictures and captions come from: folders, archives, the built-in set; the prepared format."""
