"""The deployment: certificates and files of a federation on several machines, its gateway, checks and signatures."""
