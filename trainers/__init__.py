"""Training functions for raylaunch: `train(config, session)`; raylaunch itself never imports them."""
