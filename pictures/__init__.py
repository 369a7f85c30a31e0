"""Where pictures and captions come from: folders, archives, lists, and the drawn set with its reader."""
