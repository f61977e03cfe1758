declare const ORT_VERSION: string;
