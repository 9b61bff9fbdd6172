"""Small trained checkpoints and the synthetic pictures they were trained on."""
