/* Preloaded into slurmd: /proc/PID/cgroup without the lines of cgroup version 1.
 *
 * On a machine with both versions slurmd refuses version 2 ("Hybrid mode is not supported"), though the hierarchy that
 * it would use is there. Nothing else of it is changed. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <fnmatch.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef int (*opener)(const char *, int, ...);

static int open_without_version1(opener original, const char *path, int flags)
{
    char text[65536];
    int file = original(path, flags);
    if (file < 0)
        return file;
    ssize_t length = read(file, text, sizeof text - 1);
    close(file);
    text[length > 0 ? length : 0] = '\0';
    int filtered = memfd_create("cgroup", MFD_CLOEXEC);
    for (char *rest = text, *line = strsep(&rest, "\n"); line && *line; line = strsep(&rest, "\n"))
        if (strncmp(line, "0::", 3) == 0)
            dprintf(filtered, "%s\n", line);
    lseek(filtered, 0, SEEK_SET);
    return filtered;
}

static int opened(const char *name, const char *path, int flags, mode_t mode)
{
    opener original = (opener)dlsym(RTLD_NEXT, name);
    if (fnmatch("/proc/*/cgroup", path, FNM_PATHNAME) == 0)
        return open_without_version1(original, path, flags);
    return original(path, flags, mode);
}

#define OPENER(name)                            \
    int name(const char *path, int flags, ...)  \
    {                                           \
        va_list arguments;                      \
        va_start(arguments, flags);             \
        mode_t mode = va_arg(arguments, mode_t); \
        va_end(arguments);                      \
        return opened(#name, path, flags, mode); \
    }

OPENER(open)
OPENER(open64)
