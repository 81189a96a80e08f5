"""Backbones: named models, their layer groups, freezing and pretrained weights; pure torch, no Ray.

- `catalog`: every supported name, without loading torch
- `registry`: `build(name)` makes a `Backbone`
- `backbone`, `anatomy`: a model seen as an ordered tuple of layer groups with a head behind it
- `families/`: one short file for each family, which says where its groups lie
- `weights`, `weight_files`, `published`, `preprocessing`: where weights come from and what images they expect
"""
