"""Ray, and how each job is launched on it. This package alone imports ray, and only once a job needs it."""
