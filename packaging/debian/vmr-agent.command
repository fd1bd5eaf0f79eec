#!/usr/bin/python3 -I
import sys

# Its own directory, no module for others: guest and host packages share no file and need not be of one version.
sys.path.insert(0, "/usr/share/vmr-agent")

from vmr_agent.cli.start import agent

raise SystemExit(agent())
