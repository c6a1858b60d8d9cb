"""What is trained: models and their passes, teachers, objectives, processes, checkpoints."""
