"""One short file a family: `split(model)` says where its layer groups and its head lie."""
