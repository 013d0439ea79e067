"""The command that starts the server: `python -m devops_control_tower.main`."""
