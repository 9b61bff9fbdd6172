from feature_extraction_server.client.cli import main

main()
