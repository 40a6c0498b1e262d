/* How does C read a JSON file? A small reader with nothing to link, and what it stands on: `die`, files as memory.

     Json *metadata = json_parse("model/metadata.json");
     const char *file = get(metadata, "items", "vectors", "file", NULL)->text;

   Whatever is wrong ends the program: a message that names file and byte on stderr, exit code 1. Nothing is freed. */
#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static void die(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    fputs("error: ", stderr);
    vfprintf(stderr, format, arguments);
    fputc('\n', stderr);
    exit(1);
}

static void *allocate(size_t bytes) {
    void *memory = calloc(1, bytes ? bytes : 1);
    if (!memory) die("no memory for %zu bytes", bytes);
    return memory;
}

typedef struct {
    const uint8_t *bytes;
    size_t size;
} File;

/* A file as memory: pages come from the disk, or from the page cache, when they are read. */
static File map_file(const char *path) {
    int descriptor = open(path, O_RDONLY);
    struct stat about;
    if (descriptor < 0 || fstat(descriptor, &about)) die("%s: %s", path, strerror(errno));
    File file = {(const uint8_t *)"", about.st_size};
    if (file.size) file.bytes = mmap(NULL, file.size, PROT_READ, MAP_SHARED, descriptor, 0);
    if (file.bytes == MAP_FAILED) die("%s: cannot be mapped: %s", path, strerror(errno));
    close(descriptor);
    return file;
}

static char *join(const char *folder, const char *name) {
    char *path = allocate(strlen(folder) + strlen(name) + 2);
    sprintf(path, "%s/%s", folder, name);
    return path;
}

/* kind is one of: object { array [ string " number 0 true t false f null n. Numbers stay text: int64 loses nothing. */
typedef struct Json {
    char kind;
    char *key, *text;           /* the key in the object that holds it; what a string, number or word says */
    struct Json *first, *next;  /* the first child; the next one beside it */
    size_t count;               /* children */
} Json;

typedef struct {
    const char *path, *at, *start;
} Reader;

static void json_error(Reader *reader, const char *expected) {
    die("%s: byte %zu: expected %s, found %.20s", reader->path, (size_t)(reader->at - reader->start), expected,
        *reader->at ? reader->at : "the end of the file");
}

static void skip_space(Reader *reader) { reader->at += strspn(reader->at, " \t\r\n"); }

static unsigned hex4(Reader *reader) {
    char digits[5] = {0}, *end;
    strncpy(digits, reader->at, 4);
    unsigned value = strtoul(digits, &end, 16);
    if (end != digits + 4) json_error(reader, "four hexadecimal digits");
    reader->at += 4;
    return value;
}

static char *json_string(Reader *reader) {
    if (*reader->at++ != '"') reader->at--, json_error(reader, "a string");
    const char *end = reader->at;
    while (*end && *end != '"') end += *end == '\\' && end[1] ? 2 : 1;
    char *text = allocate(end - reader->at + 1), *out = text; /* an escape is longer than what it stands for */
    while (*reader->at != '"') {
        unsigned char c = *reader->at++;
        if (c < 0x20) reader->at--, json_error(reader, "a character of a string");
        if (c != '\\') {
            *out++ = c;
            continue;
        }
        c = *reader->at++;
        const char *names = "bfnrt\"\\/", *codes = "\b\f\n\r\t\"\\/", *found = c ? strchr(names, c) : NULL;
        if (found) {
            *out++ = codes[found - names];
            continue;
        }
        if (c != 'u') reader->at--, json_error(reader, "an escape such as \\n");
        uint32_t code = hex4(reader);
        if (code >= 0xD800 && code < 0xDC00 && reader->at[0] == '\\' && reader->at[1] == 'u') {
            reader->at += 2;
            code = 0x10000 + ((code - 0xD800) << 10) + (hex4(reader) - 0xDC00);
        }
        if (code < 0x80) *out++ = code;
        else if (code < 0x800) *out++ = 0xC0 | code >> 6, *out++ = 0x80 | (code & 63);
        else {
            if (code < 0x10000) *out++ = 0xE0 | code >> 12;
            else *out++ = 0xF0 | code >> 18, *out++ = 0x80 | (code >> 12 & 63);
            *out++ = 0x80 | (code >> 6 & 63), *out++ = 0x80 | (code & 63);
        }
    }
    reader->at++;
    *out = 0;
    return text;
}

static Json *json_value(Reader *reader, int depth) {
    Json *value = allocate(sizeof *value), **last = &value->first;
    skip_space(reader);
    char c = *reader->at;
    if (depth > 64) json_error(reader, "fewer than 64 levels");
    value->kind = c;
    if (c == '{' || c == '[') {
        char close = c == '{' ? '}' : ']';
        reader->at++;
        skip_space(reader);
        while (*reader->at != close) {
            if (value->count && *reader->at++ != ',') reader->at--, json_error(reader, "a comma");
            skip_space(reader);
            char *key = c == '{' ? json_string(reader) : NULL;
            skip_space(reader);
            if (key && *reader->at++ != ':') reader->at--, json_error(reader, "a colon");
            *last = json_value(reader, depth + 1);
            (*last)->key = key;
            last = &(*last)->next;
            value->count++;
            skip_space(reader);
        }
        reader->at++;
    } else if (c == '"') {
        value->text = json_string(reader);
    } else {
        size_t length = strspn(reader->at, "+-.0123456789abcdefghijklmnopqrstuvwxyzE");
        value->text = strndup(reader->at, length);
        char *end;
        strtod(value->text, &end);
        if (c == '-' || (c >= '0' && c <= '9')) value->kind = '0';
        if (!length || (value->kind == '0' ? *end != 0
                                           : strcmp(value->text, "true") && strcmp(value->text, "false") &&
                                                 strcmp(value->text, "null")))
            json_error(reader, "a value");
        reader->at += length;
    }
    return value;
}

static Json *json_parse(const char *path) {
    File file = map_file(path);
    char *text = strndup((const char *)file.bytes, file.size);
    Reader reader = {path, text, text};
    Json *value = json_value(&reader, 0);
    skip_space(&reader);
    if (*reader.at) json_error(&reader, "nothing more");
    free(text);
    return value;
}

/* The member of an object: get(metadata, "items", "vectors", "file", NULL). */
static Json *get(Json *value, ...) {
    va_list keys;
    va_start(keys, value);
    for (const char *key; (key = va_arg(keys, const char *));) {
        Json *child = value->first;
        while (child && (!child->key || strcmp(child->key, key))) child = child->next;
        if (!child) die("metadata.json or manifest.json has no \"%s\" where it is expected", key);
        value = child;
    }
    return value;
}
