"""What watches over the steps of a run: a flight recorder, a watchdog, slow ranks, bad losses, full disks and full memories."""
