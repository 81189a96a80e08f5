"""Fine-tuning a grafted model: recipes, schedules and the training loop. Pure torch; no module here knows Ray."""
