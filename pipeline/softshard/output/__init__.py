"""The output folder of a job: who owns it, who works on it, how far it is."""
