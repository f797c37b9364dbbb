"""Submit, follow and cancel jobs on OpenPBS, PBS Professional and servers like Torque."""
