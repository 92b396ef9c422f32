"""What people look at: pictures of matches, galleries, contact sheets, figures, HTML."""
