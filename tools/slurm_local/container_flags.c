/*
 * A stand-in for NVIDIA pyxis where there are no container images: a SPANK plugin with pyxis' options of srun.
 *
 * It does what can be done without an image: --container-mounts (bind mounts in a mount namespace of the task's own)
 * and --container-workdir. The image is only told to the task, as STANDIN_CONTAINER_IMAGE. Options that would need
 * an image are accepted and have no effect. Places that had to be made for mounts are written to the file that is the
 * plugin's argument, for slurm_local.sh to remove.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <sched.h>
#include <slurm/spank.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mount.h>
#include <sys/stat.h>
#include <unistd.h>

SPANK_PLUGIN(container_flags, 1);

enum { IMAGE, MOUNTS, WORKDIR, IGNORED };
static char *given[IGNORED + 1];

static int remember(int option, const char *value, int remote) {
    free(given[option]);
    given[option] = strdup(value ? value : "");
    return 0;
}

static struct spank_option options[] = {
    {"container-image", "IMAGE", "stand-in: the image, only told to the task", 1, IMAGE, remember},
    {"container-mounts", "SRC:DST[:FLAGS],...", "stand-in: bind mounts", 1, MOUNTS, remember},
    {"container-workdir", "PATH", "stand-in: working directory", 1, WORKDIR, remember},
    {"container-name", "NAME", "stand-in: no effect", 1, IGNORED, remember},
    {"container-env", "NAMES", "stand-in: no effect", 1, IGNORED, remember},
    {"container-save", "PATH", "stand-in: no effect", 1, IGNORED, remember},
    {"container-mount-home", NULL, "stand-in: no effect", 0, IGNORED, remember},
    {"no-container-mount-home", NULL, "stand-in: no effect", 0, IGNORED, remember},
    {"container-entrypoint", NULL, "stand-in: no effect", 0, IGNORED, remember},
    {"no-container-entrypoint", NULL, "stand-in: no effect", 0, IGNORED, remember},
    {"container-writable", NULL, "stand-in: no effect", 0, IGNORED, remember},
    {"container-readonly", NULL, "stand-in: no effect", 0, IGNORED, remember},
    {"container-remap-root", NULL, "stand-in: no effect", 0, IGNORED, remember},
    {"no-container-remap-root", NULL, "stand-in: no effect", 0, IGNORED, remember},
    SPANK_OPTIONS_TABLE_END,
};

int slurm_spank_init(spank_t spank, int count, char **arguments) {
    /* As with pyxis these are options of srun, not of sbatch and salloc. */
    if (spank_context() == S_CTX_ALLOCATOR) return 0;
    for (struct spank_option *option = options; option->name; option++)
        if (spank_option_register(spank, option) != ESPANK_SUCCESS) return -1;
    return 0;
}

static void record(const char *file, const char *place) {
    FILE *records = file ? fopen(file, "a") : NULL;
    if (!records) return;
    fprintf(records, "%s\n", place);
    fclose(records);
}

/* Make the directory `path` and those above it that are missing. */
static int make_directories(const char *path, const char *file) {
    char *copy = strdup(path);
    int failed = 0;
    for (char *end = copy + 1;; end++) {
        if (*end != '/' && *end != '\0') continue;
        char kept = *end;
        struct stat found;
        *end = '\0';
        if (stat(copy, &found)) {
            failed = mkdir(copy, 0755);
            if (!failed) record(file, copy);
        }
        *end = kept;
        if (failed || kept == '\0') break;
    }
    free(copy);
    return failed;
}

/* Make the file `path` for a file to be mounted on. */
static int make_file(const char *path, const char *file) {
    char *above = strdup(path), *slash = strrchr(above, '/');
    int failed = 0;
    if (slash && slash != above) {
        *slash = '\0';
        failed = make_directories(above, file);
    }
    free(above);
    if (failed || !access(path, F_OK)) return failed;
    int descriptor = open(path, O_CREAT | O_WRONLY, 0644);
    if (descriptor < 0) return -1;
    record(file, path);
    return close(descriptor);
}

/* One SRC[:DST[:FLAGS]]. */
static int bind_mount(char *mount_spec, const char *file) {
    char *source = strsep(&mount_spec, ":"), *target = strsep(&mount_spec, ":"), *flags = mount_spec;
    struct stat found;
    if (!target) target = source;
    if (stat(source, &found)) {
        slurm_error("container_flags: the mount's source %s: %m", source);
        return -1;
    }
    if (S_ISDIR(found.st_mode) ? make_directories(target, file) : make_file(target, file)) {
        slurm_error("container_flags: the mount's target %s: %m", target);
        return -1;
    }
    if (mount(source, target, NULL, MS_BIND | MS_REC, NULL) ||
        (flags && strstr(flags, "ro") && mount(NULL, target, NULL, MS_REMOUNT | MS_BIND | MS_RDONLY, NULL))) {
        slurm_error("container_flags: mount of %s at %s: %m", source, target);
        return -1;
    }
    return 0;
}

/* As root, in the process that becomes the task. */
int slurm_spank_task_init_privileged(spank_t spank, int count, char **arguments) {
    if (!spank_remote(spank) || !given[IMAGE] || !given[MOUNTS]) return 0;
    if (unshare(CLONE_NEWNS) || mount(NULL, "/", NULL, MS_REC | MS_PRIVATE, NULL)) {
        slurm_error("container_flags: a mount namespace: %m");
        return -1;
    }
    char *rest = given[MOUNTS], *one;
    while ((one = strsep(&rest, ",")))
        if (bind_mount(one, count ? arguments[0] : NULL)) return -1;
    return 0;
}

int slurm_spank_task_init(spank_t spank, int count, char **arguments) {
    if (!spank_remote(spank) || !given[IMAGE]) return 0;
    spank_setenv(spank, "STANDIN_CONTAINER_IMAGE", given[IMAGE], 1);
    if (!given[WORKDIR]) return 0;
    if (chdir(given[WORKDIR])) {
        slurm_error("container_flags: the working directory %s: %m", given[WORKDIR]);
        return -1;
    }
    spank_setenv(spank, "PWD", given[WORKDIR], 1);
    return 0;
}
