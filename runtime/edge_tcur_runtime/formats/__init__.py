"""The only definitions of edge-tcur's file formats. The workstation imports them from here."""
